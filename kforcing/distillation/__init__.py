"""Training signals: teachers that make targets, and the losses that compare a student with them."""
