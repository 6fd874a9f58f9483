"""Graph in, plan out: ggml's backend scheduler and graph allocator."""
