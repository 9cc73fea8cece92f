"""What is in a data set, told before anything is trained."""
