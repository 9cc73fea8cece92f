"""What to look at in a folder: duplicates, outliers, wrong labels, a start."""
