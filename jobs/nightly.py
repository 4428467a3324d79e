"""The nightly job; takes what `hv-batch nightly` takes, and ends with one line of JSON.

ray job submit --runtime-env jobs/runtime_env.yaml -- python jobs/nightly.py --config C --output s3://bucket/nights \
    --manifest 's3://bucket/prompts/date={date}/prompts.parquet' --until 06:30
"""

import sys

from hv_batch.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "nightly")
    main()
