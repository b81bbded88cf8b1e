"""Look at the images and labels of datasets before training: duplicates, conflicts, thin classes, odd images."""
