from hv_batch.cli.main import main

main()
