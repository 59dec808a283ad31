"""Write this step's keys and values to their slots in the paged cache."""

from torch import Tensor


def store_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Scatter `key` and `value` into the caches, in place.

    key           [num_tokens, num_kv_heads, head_dim], any strides
    value         [num_tokens, num_kv_heads, value_dim]
    key_cache     [num_blocks, block_size, num_kv_heads, head_dim], contiguous
    value_cache   [num_blocks, block_size, num_kv_heads, value_dim], contiguous
    slot_mapping  [num_tokens] int64: block * block_size + offset of each token
    """
    key_cache.flatten(0, 1).index_copy_(0, slot_mapping, key)
    value_cache.flatten(0, 1).index_copy_(0, slot_mapping, value)
