"""The coordinator: loads a model, builds graphs, plans them as ggml does, and drives the workers."""
