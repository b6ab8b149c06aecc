"""Two million entities: ranked from disk, in memory that does not grow with them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pykalm.model.index import EntityIndex

NUM_ENTITIES, WIDTH, NUM_QUERIES = 2_000_000, 64, 300
PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np, torch
from pykalm.evaluate.ranking import rank
from pykalm.model.index import EntityIndex

def megabytes(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name + ":"))
    return int(line.split()[1]) / 1024

torch.randn(300, 64) @ torch.randn(64, 1024)
before = megabytes("VmRSS")
index = EntityIndex.load(Path(sys.argv[1]), expected_fingerprint="many")
query = torch.from_numpy(np.load(sys.argv[2]))
targets = np.arange(len(query)) * 6000
nothing = (np.zeros(len(query) + 1, dtype=np.int64), np.empty(0, dtype=np.int64))
table = rank(query, index.vectors, row_of_entity=index.row_of_entity, targets=targets, known=nothing)
given = (index.vectors.nbytes + index.row_of_entity.nbytes) / 2**20
print(json.dumps({"above": megabytes("VmHWM") - before - given, "given": given, "ranks": table.realistic.tolist()}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="measures memory as Linux reports it")
def test_two_million_entities_are_ranked_in_bounded_memory(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(NUM_ENTITIES, WIDTH, generator=generator), dim=1).half()
    query = torch.nn.functional.normalize(torch.randn(NUM_QUERIES, WIDTH, generator=generator), dim=1)
    EntityIndex(vectors, np.arange(NUM_ENTITIES), "many").save(tmp_path)
    np.save(tmp_path / "query.npy", query.numpy())
    program = [sys.executable, "-c", PROGRAM, str(tmp_path), str(tmp_path / "query.npy")]
    found = json.loads(subprocess.run(program, check=True, capture_output=True, text=True).stdout)
    # 12 bytes a vector make 23 MB; blocks of scores and vectors 4 MB; the rest is room for libraries.
    assert found["above"] < 64
    for i in (0, 299):
        scores = vectors.double() @ query[i].double()
        # Float32 may order two scores the other way that differ in their last bit.
        assert abs(found["ranks"][i] - 1 - int((scores > scores[6000 * i]).sum())) <= 2
