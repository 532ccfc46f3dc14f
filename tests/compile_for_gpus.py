"""Compiles every kernel for GPUs down to machine code, which needs no GPU; run by tests/model/test_gpu_code.py.

It is a program of its own, since kernels are either compiled or interpreted, which is settled when they are defined.
"""

from __future__ import annotations

import sys

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from outrider.engine.backends.gpu import attention, kv_store, products
from outrider.sampling.readers import gpu

HALF, SINGLE, DOUBLE = "*bf16", "*fp32", "*fp64"
PRODUCT = {
    **dict.fromkeys(("inputs", "weight", "bias"), HALF),
    **dict.fromkeys(("num_rows", "num_outputs", "input_row"), "i32"),
}
SIZES = {"NUM_INPUTS": 4096, "HAS_BIAS": True}
PARTS = dict.fromkeys(("parts", "vocab_sizes", "temperatures", "uniforms", "noises"), DOUBLE)
PARTS |= {"rows": SINGLE, "row_stride": "i32", "num_parts": "i32"}
BUFFERS = {"counts": "*i32", "kept_ids": "*i32", "kept_numbers": SINGLE, "min_prob": "fp32"}
CANDIDATES = {"NUM_BEST": 3, "PARTS": 64, "PART": 4096, "CAPACITY": 8192}
HEADS = {"HEAD_DIM": 128, "PADDED_DIM": 128, "NUM_SPLITS": 16}


def product(activation: int, outputs: int, inputs: int, stages: int, parts: int = 1, rows: int = 16) -> tuple:
    tiles = {"BLOCK_OUTPUTS": outputs, "BLOCK_INPUTS": inputs, "NUM_STAGES": stages, "PART_INPUTS": 4096 // parts}
    types = PRODUCT | {"outputs": HALF if parts == 1 else SINGLE}
    return products._product, types, SIZES | tiles | {"ACTIVATION": activation, "BLOCK_ROWS": rows}


PRODUCTS = {
    "wide product": (products.GELU, 64, 64, 6),
    "gated product": (products.GATED_SILU, 32, 256, 3),
    "narrow product": (products.NO_ACTIVATION, 32, 128, 6),
    "product in parts": (products.NO_ACTIVATION, 32, 128, 6, 2),
}
KERNELS = {
    **{
        f"{name}, {rows} rows": product(*tiles, rows=rows)
        for name, tiles in PRODUCTS.items()
        for rows in (16, products.MOST_ROWS)
    },
    "norm": (
        products._norm,
        dict.fromkeys(("inputs", "weight", "bias", "sums", "outputs"), HALF)
        | {"parts": SINGLE, "num_rows": "i32", "input_row": "i32", "eps": "fp32"},
        {"NUM_PARTS": 2, "SIZE": 1600, "BLOCK": 2048, "IS_CENTRED": True},
    ),
    "kv_store": (
        kv_store._store,
        dict.fromkeys(("projected", "keys", "values"), HALF)
        | {"positions": "*i64", "slots": "*i64", "cosines": SINGLE, "sines": SINGLE, "first_head": "i32"},
        {"NUM_QUERY_HEADS": 32, "NUM_HEADS": 8, "HALF_DIM": 64, "PADDED_HALF": 64, "HAS_ANGLES": True},
    ),
    "attention": (
        attention._attend,
        dict.fromkeys(("query", "keys", "values", "output"), HALF)
        | dict.fromkeys(("parts", "sums"), SINGLE)
        | dict.fromkeys(("cu_seq_q", "seqused_k", "block_table"), "*i32")
        | dict.fromkeys(("query_token", "query_head", "key_slot", "value_slot", "key_head", "value_head"), "i32")
        | {"scale": "fp32", "table_row": "i32", "num_tokens": "i32", "num_tiles": "i32"},
        HEADS | {"GROUP": 4, "BLOCK_SIZE": 64, "WINDOW": 100, "NUM_HEADS": 8, "TILE_ROWS": 16, "TILE_KEYS": 64},
    ),
    "parts of attention": (
        attention._combine,
        {"parts": SINGLE, "sums": SINGLE, "output": HALF, "num_rows": "i32"},
        HEADS,
    ),
    "parts of rows": (
        gpu._scan,
        PARTS | {"vocab_size": "i32"},
        {"HAS_SIZES": True, "NUM_BEST": 3, "PART": 4096},
    ),
    "counts of candidates": (gpu._collect, PARTS | BUFFERS, CANDIDATES | {"ARE_COUNTED": False}),
    "candidates": (gpu._collect, PARTS | BUFFERS, CANDIDATES | {"ARE_COUNTED": True}),
    "drafts": (
        gpu._draft,
        PARTS | BUFFERS | {"table": DOUBLE, "max_supports": DOUBLE, "token_ids": "*i64"},
        {"MOST": 1024, "NUM_OTHERS": 2, "NUM_BEST": 3, "PARTS": 64, "CAPACITY": 8192},
    ),
    "target rows": (
        gpu._target,
        PARTS
        | dict.fromkeys(("support_ids", "ends", "left", "table"), DOUBLE)
        | {"num_rows": "i32", "vocab_size": "i32"},
        {"PARTS": 64, "BLOCK": 8192, "BLOCK_IDS": 256},
    ),
}
NUM_WARPS = dict.fromkeys((name for name in KERNELS if "product" in name), 4)
NUM_WARPS |= {"kv_store": 1, "attention": 4, "parts of attention": 1, "drafts": 16, "target rows": 16}  # others 8
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}  # that a program can have, CUDA C Programming Guide


def _aligned(kernel, types: dict[str, str]) -> list[int]:
    """Return the indices of arguments that are multiples of 16, as most are: loads are then wide and pipelined."""
    are_whole = [types.get(argument, "fp").startswith(("*", "i")) for argument in kernel.arg_names]
    return [
        index
        for index, (is_whole, param) in enumerate(zip(are_whole, kernel.params, strict=True))
        if is_whole and not param.do_not_specialize
    ]


def main(capability: int) -> None:
    """Compile all of them for GPUs of a compute capability and print their names."""
    for name, (kernel, types, constants) in KERNELS.items():
        names = kernel.arg_names
        source = ASTSource(
            fn=kernel,
            signature={argument: types.get(argument, "constexpr") for argument in names},
            constexprs={(names.index(argument),): value for argument, value in constants.items()},
            attrs={(index,): [["tt.divisibility", 16]] for index in _aligned(kernel, types)},
        )
        options = {"num_warps": NUM_WARPS.get(name, 8)}
        code = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert code.asm["cubin"]
        assert code.metadata.shared <= SHARED_BYTES[capability], f"{name} takes {code.metadata.shared} bytes"
        print(name, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
