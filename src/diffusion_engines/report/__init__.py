"""The page, tables and figures that a person looks at."""
