"""Steps of an engine over pages, one of each kind."""

from flexmsa.testing import PagedStep

E4M3 = {"fp8_keys": True, "index_dtype": "float8_e4m3fn"}
CASES = {
    "decode": PagedStep((1, 1, 1), (20, 77, 0), uniform=True),
    "drafts": PagedStep((3, 3), (50, 9), uniform=True),
    "drafts of several lengths": PagedStep((2, 1, 4), (50, 9, 33), padding=3),
    "chunks and decodes": PagedStep((1, 21, 1, 0, 17), (90, 100, 3, 0, 17), padding=2),
    "decodes first": PagedStep((1, 1, 21, 5), (90, 100, 30, 77), padding=3, num_decodes=2),
    "five decodes first": PagedStep((1, 1, 1, 1, 1, 19), (90, 100, 3, 17, 48, 60), num_decodes=5),
    "decodes and padding": PagedStep((1, 1), (90, 100), padding=3, num_decodes=2),
    "one chunk": PagedStep((40,), (95,)),
    "fewer keys than queries": PagedStep((5, 20), (3, 90)),
    "odd pages": PagedStep((1, 18), (40, 50), block_size=12),
    "16 bits": PagedStep((1, 19, 1), (70, 60, 33), dtype="float16"),
    "every block": PagedStep((1, 18, 1), (70, 60, 33), topk=None),
    "scale per token": PagedStep((1, 19, 1), (70, 60, 33), scales="token", **E4M3),
    "scale per tensor": PagedStep((1, 19, 1), (70, 60, 33), scales="tensor", **E4M3),
    "no scale": PagedStep((1, 1), (70, 60), scales="none", **E4M3, uniform=True),
    "e4m3 keys": PagedStep((1, 1, 19), (70, 60, 33), fp8_keys=True, scales="none", num_decodes=2),
    "int8 index keys": PagedStep((1, 1, 19), (70, 60, 33), index_dtype="int8", num_decodes=2),
    "e4m3 index keys": PagedStep((1, 1, 19), (70, 60, 33), index_dtype="float8_e4m3fn", scales="none", num_decodes=2),
}
