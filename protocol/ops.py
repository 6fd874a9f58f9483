"""ggml's operations, tensor flags and buffer usages, under ggml's names and numbers (0.20.2).

`UNPAD` alone is none of ggml's: the op of December 2024's vision branch that drops padding at the end of an axis.

Op parameters are a tuple of ints and floats in the order and at the position (32-bit words) of ggml's `op_params`:

    RMS_NORM, NORM        (eps,)
    SCALE                 (scale, bias)
    SOFT_MAX              (scale, max_bias)                src x, mask | absent
    FLASH_ATTN_EXT        (scale, max_bias, logit_softcap, precision)   src q, k, v, mask | absent
    ROPE                  (0, n_dims, mode, 0, n_ctx_orig, freq_base, freq_scale, ext_factor, attn_factor, beta_fast,
                           beta_slow)    mode 0: pairs (2i, 2i+1), mode 2 (NeoX): pairs (i, i + n_dims/2);
                           src x, positions i32, frequency factors f32 | absent
    CONCAT                (axis,)
    PAD                   (0, right0, 0, right1, 0, right2, 0, right3)  (left0, right0, ...: left is 0 here)
    UNPAD                 (drop0, drop1, drop2, drop3)
    IM2COL                (stride0, stride1, pad0, pad1, dilation0, dilation1, is_2d)  src kernel (shape only), image
    UNARY                 (UnaryOp,)
    GLU                   (GluOp, swapped)                src gate, up
    ACC                   (nb1, nb2, nb3, offset, inplace)   in bytes
    PERMUTE               (axis0, axis1, axis2, axis3)
    RESHAPE, VIEW, TRANSPOSE, CONT, CPY, DUP, GET_ROWS, SET_ROWS, REPEAT, ADD, MUL, MUL_MAT: ()
"""

from __future__ import annotations

from enum import IntEnum, IntFlag


class Op(IntEnum):
    """What a node computes: `enum ggml_op`."""

    NONE = 0
    DUP = 1
    ADD = 2
    ADD_ID = 3
    ADD1 = 4
    ACC = 5
    SUB = 6
    MUL = 7
    DIV = 8
    SQR = 9
    SQRT = 10
    LOG = 11
    SIN = 12
    COS = 13
    SUM = 14
    SUM_ROWS = 15
    CUMSUM = 16
    MEAN = 17
    ARGMAX = 18
    COUNT_EQUAL = 19
    REPEAT = 20
    REPEAT_BACK = 21
    CONCAT = 22
    SILU_BACK = 23
    NORM = 24
    RMS_NORM = 25
    RMS_NORM_BACK = 26
    GROUP_NORM = 27
    L2_NORM = 28
    MUL_MAT = 29
    MUL_MAT_ID = 30
    OUT_PROD = 31
    SCALE = 32
    SET = 33
    CPY = 34
    CONT = 35
    RESHAPE = 36
    VIEW = 37
    PERMUTE = 38
    TRANSPOSE = 39
    GET_ROWS = 40
    GET_ROWS_BACK = 41
    SET_ROWS = 42
    DIAG = 43
    DIAG_MASK_INF = 44
    DIAG_MASK_ZERO = 45
    SOFT_MAX = 46
    SOFT_MAX_BACK = 47
    ROPE = 48
    ROPE_BACK = 49
    CLAMP = 50
    CONV_TRANSPOSE_1D = 51
    IM2COL = 52
    IM2COL_BACK = 53
    IM2COL_3D = 54
    COL2IM_1D = 55
    CONV_2D = 56
    CONV_3D = 57
    CONV_2D_DW = 58
    CONV_TRANSPOSE_2D = 59
    POOL_1D = 60
    POOL_2D = 61
    POOL_2D_BACK = 62
    UPSCALE = 63
    PAD = 64
    PAD_REFLECT_1D = 65
    ROLL = 66
    ARANGE = 67
    TIMESTEP_EMBEDDING = 68
    ARGSORT = 69
    TOP_K = 70
    LEAKY_RELU = 71
    TRI = 72
    FILL = 73
    FLASH_ATTN_EXT = 74
    FLASH_ATTN_BACK = 75
    SSM_CONV = 76
    SSM_SCAN = 77
    WIN_PART = 78
    WIN_UNPART = 79
    GET_REL_POS = 80
    ADD_REL_POS = 81
    RWKV_WKV6 = 82
    GATED_LINEAR_ATTN = 83
    RWKV_WKV7 = 84
    SOLVE_TRI = 85
    GATED_DELTA_NET = 86
    LIGHTNING_INDEXER = 87
    DSV4_HC_COMB = 88
    DSV4_HC_PRE = 89
    DSV4_HC_POST = 90
    UNARY = 91
    MAP_CUSTOM1 = 92
    MAP_CUSTOM2 = 93
    MAP_CUSTOM3 = 94
    CUSTOM = 95
    CROSS_ENTROPY_LOSS = 96
    CROSS_ENTROPY_LOSS_BACK = 97
    OPT_STEP_ADAMW = 98
    OPT_STEP_SGD = 99
    GLU = 100
    UNPAD = 200


class UnaryOp(IntEnum):
    """Parameter of `Op.UNARY`: `enum ggml_unary_op`."""

    ABS = 0
    SGN = 1
    NEG = 2
    STEP = 3
    TANH = 4
    ELU = 5
    RELU = 6
    SIGMOID = 7
    GELU = 8
    GELU_QUICK = 9
    SILU = 10
    HARDSWISH = 11
    HARDSIGMOID = 12
    EXP = 13
    EXPM1 = 14
    SOFTPLUS = 15
    GELU_ERF = 16
    XIELU = 17
    FLOOR = 18
    CEIL = 19
    ROUND = 20
    TRUNC = 21


class GluOp(IntEnum):
    """Parameter of `Op.GLU`: `enum ggml_glu_op`."""

    REGLU = 0
    GEGLU = 1
    SWIGLU = 2
    SWIGLU_OAI = 3
    GEGLU_ERF = 4
    GEGLU_QUICK = 5


class Flag(IntFlag):
    """Tensor flags: `enum ggml_tensor_flag`."""

    INPUT = 1
    OUTPUT = 2
    PARAM = 4
    LOSS = 8
    COMPUTE = 16


class Usage(IntEnum):
    """What a buffer is for: `enum ggml_backend_buffer_usage`."""

    ANY = 0
    WEIGHTS = 1
    COMPUTE = 2


VIEW_OPS = frozenset({Op.VIEW, Op.RESHAPE, Op.PERMUTE, Op.TRANSPOSE})
"""Ops that move no bytes: they start no split and are not computed."""

WRITES_ONLY = {Op.CPY: 1, Op.SET_ROWS: 2}
"""Ops that only write to the source of this number."""

MAX_SRC = 10
"""ggml's GGML_MAX_SRC."""

PARAM_KINDS: dict[Op, str] = {
    Op.RMS_NORM: "f",
    Op.NORM: "f",
    Op.L2_NORM: "f",
    Op.SCALE: "ff",
    Op.CLAMP: "ff",
    Op.SOFT_MAX: "ff",
    Op.FLASH_ATTN_EXT: "fffi",
    Op.ROPE: "iiiiiffffff",
    Op.CONCAT: "i",
    Op.PAD: "iiiiiiii",
    Op.UNPAD: "iiii",
    Op.IM2COL: "iiiiiii",
    Op.UNARY: "i",
    Op.GLU: "ii",
    Op.ACC: "iiiii",
    Op.DIAG_MASK_INF: "i",
    Op.PERMUTE: "iiii",
}
"""Types of an op's parameters, 32 bits each: `i` int, `f` float (struct codes). Ops not listed have none."""
