"""Sampling without a sort: nothing is sent to the host, each row follows its own parameters.

The first pass has a program for each `CHUNK` tokens of each row. It applies penalties and the
temperature, and stores its chunk's best token (with noise added, if the row is sampled from
all of its tokens) and mass. For rows that need them it also stores the chunk's highest scores:
at most `KEPT`, and the bound above which there are no others. The second pass has a program for
each row, which merges the chunks. If the row has no threshold, that is all. If it has one, the
candidates above the highest bound of a chunk are brought together, usually a few hundred, and
held in registers while the thresholds are found and a token is drawn. The third pass does
nothing, but for the rows where more than `HELD` tokens matter.

Weights are integers: a probability relative to the best token's, in units of 2^-40. Integer
sums do not depend on their order, so a row's result depends neither on the layout nor on other
rows. Weights equal the real masses up to float32's error in an exponential: a token may fall on
either side of a limit if the mass above it is within 1e-6 of that limit, or if its surprise
is that near to typical-p's limit.

Bytes, for V tokens of b bytes each: the logits are read once, V * b, and for rows with penalties
their counts, V * 4, in the first pass. The candidates are V / 16 * 8 bytes, which the second
pass reads once. In the third, the search passes over the candidates some thirty times, in the L1
cache. If a row's threshold lies below its candidates (flat distributions, top_k above KEPT / 2,
typical_p alone), its one program processes the row once more: it writes V * 4 bytes and passes
over those instead. For a row whose temperature is below `SMALL_TEMPERATURE`, each program first
reads the whole row, to find its highest score.
"""

from kernels.fused_sampling.launch import greedy, sample

__all__ = ["greedy", "sample"]
