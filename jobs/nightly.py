"""Runs `hv-batch nightly` as a Ray job, with the same arguments. Prints one line of JSON at the end.

ray job submit --runtime-env jobs/runtime_env.yaml -- python jobs/nightly.py --config C --output s3://bucket/nights \
    --manifest 's3://bucket/prompts/date={date}/prompts.parquet' --until 06:30
"""

import sys

from hv_batch.__main__ import main

if __name__ == "__main__":
    sys.argv.insert(1, "nightly")
    main()
