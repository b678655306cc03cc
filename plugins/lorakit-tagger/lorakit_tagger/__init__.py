"""Tags of images for lorakit, by an ONNX model of the WD14 kind."""
