"""Exports: a database, or arrays that were computed elsewhere, as files that other programs can
read and write.

    my-export/
        manifest.json           what this is an export of; written last: without it, unfinished
        tokenizer.json          the model's tokenizer, where there is one
        codec-….bin             parameters of a fitted codec (storage_format.md), if there is one
        part-00001.jsonl        a line for each document
        part-00001.safetensors  embeddings and memories of the documents' references, in order
        part-00002.jsonl        ...

Nothing here touches a store. `ExportWriter` writes such a folder, `read_export` reads one, and
believes nothing that it reads.

A line of a part has `text` and may have `id`, `metadata`, `version` and `references`: the length
in characters and the tokens of each piece that the text was cut into, e.g. `[[120, 28], [90, 21]]`.

Tensors, n being the references of the part's documents:

- `embeddings`: F32 (n, dimension).
- `memories`, U8 (bytes,), and `memory_offsets`, I64 (n + 1,): payloads as in the table `memories`,
  one after the other; two equal offsets: the reference is cold.
- Or, instead of these two, the arrays of a `MemoryBatch`: `counts`, integers (n, rows); `positions`
  (pairs,); `keys` and `values` (pairs, head_dim); and, if some references are cold, `warm`, U8 or
  BOOL (n,). Keys and values of a bfloat16 model are BF16, or U16 with `"dtype": "bfloat16"` in the
  file's metadata, which is what `ExportWriter` writes, since numpy has no bfloat16.

With none of them, all references of the part are cold. The file's metadata may have checksums,
XXH3-64 in hexadecimal: `xxh3.documents` of the .jsonl file, `xxh3.embeddings` and so on of the
tensors' bytes, all of them or none. The manifest may have one of itself and tokenizer.json
(`manifest.checksum`). What has none is checked for sense, not for damage.
"""

from __future__ import annotations

from memdb.exchange.lines import Entry
from memdb.exchange.manifest import Manifest
from memdb.exchange.reading import ExportPart, read_export
from memdb.exchange.writing import ExportWriter

__all__ = ["Entry", "ExportPart", "ExportWriter", "Manifest", "read_export"]
