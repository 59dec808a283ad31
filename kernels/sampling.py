"""Noise for sampling, a function of what is sampled and not of a random generator's state.

Adding Gumbel noise to the scores and taking the argmax draws from their softmax
(Gumbel 1954; Maddison et al. 2014). The noise of a token is a hash of the request's
seed, the position and the token id (counter-based generators: Salmon et al. 2011), so a
draw depends on its request alone: not on the batch it runs in, nor on what ran before.
"""

import numpy as np
import torch
from torch import Tensor

ROW_PARAMETERS = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("typical_p", np.float32),
        ("repetition_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("output_frequency_penalty", np.float32),
        ("do_sample", np.int32),
        ("noise_key", np.int32, 2),
        ("slot", np.int32),
        ("context_length", np.int32),
        ("top_n_tokens", np.int32),
    ]
)
"""What `kernels.fused_sampling` reads for each row: words of 4 bytes, uploaded as int32.

Neutral values switch a step off: temperature 1, top_k 0, top_p 1, typical_p 1, the repetition
penalty 1, other penalties 0. The temperature is from 2^-100 to 2^100. `do_sample` and
`top_n_tokens` are only compared with 0. `slot` is the row's index in the token counts and
`context_length` the number of its tokens; only penalties read them.
"""

GENERATED = 1 << 30
"""Bit flag in a token's count: the token was generated at least once."""
IN_PROMPT = 1 << 29
"""Bit flag in a token's count: the token is in the prompt, whose tokens are not counted.

It is set only in the slots of sequences whose frequency penalty is OpenAI's. A token whose count
is not 0, flags included, is in the context.
"""

SMALL_TEMPERATURE = 2.0**-10
"""Below this temperature a row's highest score is subtracted before scores are divided.

The quotients would lose the digits that noise is added to, and at last overflow.
"""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def noise_keys(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return two 32-bit key words per row, [rows, 2] int32, from uint64 seeds and positions.

    The generator is splitmix64 (Steele et al. 2014), started from the seed and stepped by the
    position.
    """
    with np.errstate(over="ignore"):
        state = _mix64(seeds.astype(np.uint64)) + _GOLDEN * (positions.astype(np.uint64) + 1)
        return _mix64(state).view(np.int32).reshape(-1, 2)


def _mix64(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def gumbel_noise(keys: Tensor, vocab_size: int) -> Tensor:
    """Return standard Gumbel noise, [rows, vocab_size] float32.

    keys  [rows, 2] int32 from `noise_keys`

    31 bits of a hash make a uniform u in (0, 1), and -log(-log1p(-u)) is the noise: float32
    is densest near u = 0, which is the upper tail that decides draws.
    """
    uniform = hash31(keys, vocab_size).float().add_(0.5).mul_(2.0**-31)
    return uniform.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_().log_().neg_()


def hash31(keys: Tensor, vocab_size: int) -> Tensor:
    """Hash each token id under each key to 31 bits, [rows, vocab_size] int32.

    keys  [rows, 2] int32

    The hash is triple32 (Wellons 2018), keyed before its first and second round.
    """
    x = torch.arange(vocab_size, dtype=torch.int32, device=keys.device) + keys[:, :1]
    x ^= (x >> 17) & 0x7FFF  # int32 shifts copy the sign: the mask makes them logical
    x *= _int32(0xED5AD4BB)
    x ^= (x >> 11) & 0x1FFFFF
    x += keys[:, 1:]
    x *= _int32(0xAC4C1B51)
    x ^= (x >> 15) & 0x1FFFF
    x *= _int32(0x31848BAB)
    x ^= (x >> 14) & 0x3FFFF
    x &= 0x7FFFFFFF
    return x


def _int32(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
