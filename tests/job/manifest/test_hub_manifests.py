"""Manifests on the Hugging Face Hub: the real client of `hf://` and a local server. No network is used."""

import io
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.hub_server import hub_server

READ = """
import json, sys
from hv_batch.job.manifest.reader import Manifest
from hv_batch.protocol import UserError
results = []
for url in sys.argv[1:]:
    manifest = Manifest(url)
    try:
        results.append([[row for _, row in manifest.rows()], manifest.public_urls, manifest.digest])
    except UserError as error:
        results.append(str(error))
print(json.dumps(results))
"""


def test_manifests_come_from_dataset_repositories():
    """Files, globs and folders of a dataset repository, also of the revision with the Hub's own Parquet files."""
    sink = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["a", "b"], "score": [1.0, 2.0]}), sink)
    files = {
        "README.md": b"---\nlicense: mit\n---\n",
        ".gitattributes": b"*.parquet filter=lfs\n",
        "data/train.parquet": sink.getvalue(),
        "prompts/take=1/list.txt": b"a cat\r\na dog\r\n",
    }
    root = "hf://datasets/org/prompts"
    urls = [f"{root}/data/train.parquet", f"{root}/data/*.parquet", f"{root}/prompts", root, f"{root}/none.txt"]
    with hub_server(files) as endpoint:
        environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", READ, *urls], capture_output=True, text=True, timeout=150, env=environment
        )
    assert done.returncode == 0, done.stderr
    file, matched, folder, whole, missing = json.loads(done.stdout)
    table = [{"prompt": "a", "score": 1.0}, {"prompt": "b", "score": 2.0}]
    assert file[0] == matched[0] == table
    assert file[2] == matched[2]
    assert file[1] == urls[0]
    texts = [{"prompt": "a cat", "take": "1"}, {"prompt": "a dog", "take": "1"}]
    assert folder[0] == texts
    assert whole[0] == table + texts  # README.md is not a manifest
    assert "does not exist" in missing
