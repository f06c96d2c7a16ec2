"""Two states of a fleet side by side: what each measured, and which changes are more than noise."""
