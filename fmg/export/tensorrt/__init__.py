"""TensorRT engines from the graphs of an artifact, built by Polygraphy in a separate process."""
