"""What a run can be told: fields, recipes, overrides on the command line, their validation, and the file that keeps them."""
