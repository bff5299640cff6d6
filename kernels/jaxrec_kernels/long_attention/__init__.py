"""Causal attention on rows that do not fit the vector memory, and the causal mix before it.

Why kernels. Composed of XLA's operations, tiles of logits and weights and their gradients go to
main memory and back. Here the only squares there are lie in registers; a mixed array is written
once and kept for backward. Forward takes 4 n^2 d FLOPs a sequence and head, causal half (two mixes,
two products), backward 9 n^2 d (the logits again, four products of the attention, four of the
mixes).
At [4, 8192, 8, 128]: 1.1 TFLOP forward and 2.5 backward, 5.6 and 12.6 ms at a v5e's 197 TFLOP/s,
where its 819 GB/s move the arrays, 64 MiB each, in 0.1 ms apiece.

`tpu` has the interface of the kernel for short rows; `forward`, `backward` and `mix` are its parts.
"""
