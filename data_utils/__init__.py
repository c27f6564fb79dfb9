"""Episodes on disk -> samples -> batches. Imports numpy, h5py, OpenCV and torch; never `apt`."""
