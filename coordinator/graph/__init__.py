"""Facts in, computation graphs with ggml's ops, shapes, strides and visit order out."""
