"""The layout of the tables that planning writes and kernels read; plain numbers, without Triton."""

# Roles of the rows of addresses; a step count is fp32, and states follow to the end.
PARAM, GRAD, STEP, FIRST_STATE = range(4)

# A tile: tensor, offset of its first unit, units (first column in a split unit), first slot.
TILE_FIELDS = 4
# A tensor: length of a unit, inner, stride between inner runs, group, span of a part.
TENSOR_FIELDS = 5

# Values per group in front of a rule's own: clipping, agc_eps, sign (-1 to maximize).
FIXED_VALUES = 3
# A rule's own raw values per group, at most.
RULE_VALUES = 8

# Constants per tensor: room for this many, ...
CONSTANTS = 16
# ... what they are (DIRECTION is 1 / grad_scale, negative to maximize), ...
ACTIVE, CLIPPING, AGC_EPS, INVERSE_SCALE, DIRECTION = range(5)
# ... where the rule's own begin, and how many these are at most.
OF_RULE = 5
RULE_CONSTANTS = 8
