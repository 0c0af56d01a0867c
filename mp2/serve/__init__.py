"""An HTTP server for the tasks of a bundle: many tasks on one frozen backbone, in common batches."""
