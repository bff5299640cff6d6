"""Cross-entropy over an item catalogue on a TPU, without the logits in main memory.

Two kernels. `tpu_forward` gives each position's statistics (largest logit, sum of exponentials, the
label's logit) and, where a gradient will be wanted, the sum of item rows weighted by them, which is
all that the gradient of the position needs of the catalogue. `tpu_backward` takes the logits again
and gives the gradient of the item table. Together they are four products of [P, D] and [D, V], two
in each.

Why they exist. With P = 25,600, V = 100,000, D = 64 in bfloat16 the logits are 10.2 GB in float32.
A form that writes and reads them once in each direction moves 41 GB, 50 ms on a v5e; XLA's blocked
form keeps a block of them in VMEM, but makes several passes over it. The kernels' own traffic is
the item table once for every 512 positions and the positions once for every 2,048 items: 0.8 GB
together, 1 ms. The four products are 1.3 TFLOP, 6.7 ms at 197 TFLOP/s. On an H100 (990 TFLOP/s,
3.35 TB/s) the same numbers are 12 ms for the logits' traffic and 1.3 ms for the products.

Arrays whose width is no multiple of 128 lie transposed in a TPU's memory, the width before the
rows, since their rows would be padded to 128 lanes. The kernels take them as they lie.
"""
