"""Which block sizes and depths a layer can hold, and the nearest ones where it cannot."""

from __future__ import annotations


def fits(d: int, b: int, m: int) -> bool:
    """Whether d features split into m butterfly factors of b × b blocks.

    d must be a multiple of b · 2^(m-1), the super-block, and b must be even where there is more than one factor.
    """
    return b >= 1 and m >= 1 and d % (b << (m - 1)) == 0 and (m == 1 or b % 2 == 0)


def resolve(d: int, block_size: int, block_num: int, m: int) -> tuple[int, int]:
    """Block size b and number of blocks D for d features, from whichever of the two is given (the other is 0).

    Raises:
        ValueError: If they do not fit, with the nearest values that do.
    """
    if block_size:
        b, given = block_size, f"boft_block_size b={block_size}"
    else:
        b = d // block_num if d % block_num == 0 else 0
        given = f"boft_block_num D={block_num}"
    if fits(d, b, m):
        return b, d // b
    rule = f"{given} with boft_n_butterfly_factor m={m} does not fit d={d} input features"
    raise ValueError(f"{rule}; nearest that fit: {suggestions(d, block_size, block_num, m)}")


def suggestions(d: int, block_size: int, block_num: int, m: int) -> str:
    """The nearest values that fit d features: other block sizes (or numbers) at this m, other m at this block size."""
    sizes = [b for b in range(1, d + 1) if fits(d, b, m)]
    found = []
    if block_size and sizes:
        found.append(f"b={_nearest(sizes, block_size)} with m={m}")
    if block_num and sizes:
        found.append(f"D={_nearest([d // b for b in sizes], block_num)} with m={m}")
    b = block_size or (d // block_num if d % block_num == 0 else 0)
    depths = [n for n in range(1, d.bit_length() + 1) if fits(d, b, n)]
    if depths:
        found.append(f"m={_nearest(depths, m)} with " + (f"b={b}" if block_size else f"D={block_num}"))
    return ", or ".join(found) if found else "none; leave this layer out"


def _nearest(values: list[int], wanted: int) -> str:
    """The closest values below and above."""
    below = [value for value in values if value < wanted]
    above = [value for value in values if value > wanted]
    return " or ".join(str(value) for value in ([max(below)] if below else []) + ([min(above)] if above else []))
