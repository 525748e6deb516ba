"""What a run can be told: fields, recipes, overrides on the command line, and their validation."""
