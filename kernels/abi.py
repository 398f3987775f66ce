"""The layout of the tables that planning writes and kernels read; plain numbers, without Triton."""

# Roles of the rows of addresses; a rule's scalars follow (fp32, one element), then its states.
PARAM, GRAD, SCALARS = range(3)

# A tile: tensor, offset of its first unit, units (first column in a split unit), the number of its
# first unit among all units of a plan, and in a split unit the position of its first pair of sums,
# or where units are split between ranks that of the first unit's pair in the exchange.
TILE_FIELDS = 5
# A part of a unit has the same fields, but for the fourth: 1 where it is all of a unit here that is
# split between ranks, whose pair is in the exchange.
# A tensor: length of a unit, inner, stride between inner runs, group, span of a part.
TENSOR_FIELDS = 5

# Such a unit of several parts: its first part, their number, position of its pair in the exchange.
FOLD_FIELDS = 3

# Values per group in front of a rule's own: clipping, agc_eps, sign (-1 to maximize).
FIXED_VALUES = 3
# A rule's own raw values per group, at most.
RULE_VALUES = 8

# What `begin` prepares per tensor (DIRECTION is 1 / grad_scale, negative to maximize), and where
# the rule's own begin.
ACTIVE, CLIPPING, AGC_EPS, INVERSE_SCALE, DIRECTION, OF_RULE = range(6)
