"""What the `toca` command runs, one module a subcommand; extras are imported on use."""
