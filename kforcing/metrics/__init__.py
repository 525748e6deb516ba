"""What is measured of a student: fidelity to its teacher, quality of its text, FLOPs and bytes."""
