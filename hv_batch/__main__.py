from hv_batch.cli import main

main()
