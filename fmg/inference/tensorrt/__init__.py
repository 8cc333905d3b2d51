"""TensorRT engines of an artifact: finding them, running them, checking and refitting them. Imports no TensorRT."""
