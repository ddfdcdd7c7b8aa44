"""Incorrect answers to exercise 7, as tables, and the feedback that each must get."""


def table(pi_theta, layer_2, attn_2, ffn_3, tied):
    """Return a table from five columns, each a text of 0s and 1s from the embedding to E_u."""
    names = ["embedding", "absent"]
    names += [f"{module} {l}" for l in (1, 2, 3, 4) for module in ("attn", "ffn")]
    names += ["final norm", "E_u"]
    lines = ["  pi_theta   Layer 2   ATTN 2   FFN 3   Layer 2, tied"]
    for name, *cells in zip(names, pi_theta, layer_2, attn_2, ffn_3, tied):
        lines.append(f"{name:12}" + "     ".join(cells))
    return "\n".join(lines)


#              embedding, absent, attn 1, ffn 1, .., ffn 4, final norm, E_u
RIGHT = ["101111111111", "101111000001", "101110000001", "101111110001", "111111000001"]


def changed(**columns):
    """Return the correct table with some columns replaced, c0 to c4."""
    return table(*(columns.get(f"c{i}", column) for i, column in enumerate(RIGHT)))


UP = changed(c1="100001111101", c2="100001111101", c3="100000011101", c4="110001111101")
ONLY_ITS_OWN = changed(c1="100011000001", c2="100010000001", c3="100000110001", c4="110011000001")
NORM = changed(c1="101111000011", c2="101110000011", c3="101111110011", c4="111111000011")
NO_E_U = changed(c1="101111000000", c2="101110000000", c3="101111110000", c4="111111000000")
NO_EMBEDDING = changed(c1="001111000001", c2="001110000001", c3="001111110001")
WHOLE_LAYER = changed(c2="101111000001")
NO_ATTN_3 = changed(c3="101111010001")
ABSENT = table(*("11" + column[2:] for column in RIGHT))
NOT_TIED = changed(c4="101111000001")
FROZEN = changed(c0="101111111100")
LETTERS = changed(c0="xxxxxxxxxxxx")

WRONG = [
    ("PREDICTION", UP, "above"),
    ("PREDICTION", ONLY_ITS_OWN, "below"),
    ("PREDICTION", NORM, "final norm"),
    ("PREDICTION", NO_E_U, "E_u"),
    ("PREDICTION", NO_EMBEDDING, "embedding"),
    ("PREDICTION", WHOLE_LAYER, "ffn above attention"),
    ("PREDICTION", NO_ATTN_3, "attention below ffn"),
    ("PREDICTION", ABSENT, "absent"),
    ("PREDICTION", NOT_TIED, "absent, tied"),
    ("PREDICTION", changed(c0="101111111101"), "pi_theta"),
    ("PREDICTION", FROZEN, "pi_theta"),
    ("PREDICTION", LETTERS, "form"),
    ("PREDICTION", "all of them", "form"),
    ("PREDICTION", None, "form"),
]
