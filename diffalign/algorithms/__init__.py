"""Algorithms: where batches come from and which loss they meet. One file each, registered in `training/run.py`."""
