"""Distribution: Ray Data, Ray Train, DeepSpeed and MLflow around the mathematics in `kforcing`."""
