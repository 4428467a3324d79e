"""Going on with a run by its output root alone, as a Ray job; takes what `hv-batch resume` takes.

ray job submit --runtime-env jobs/runtime_env.yaml -- python jobs/resume.py s3://bucket/run-1
"""

import sys

from hv_batch.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "resume")
    main()
