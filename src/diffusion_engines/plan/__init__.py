"""What `dvc repro` would do in a workspace, and why, found out without running anything."""
