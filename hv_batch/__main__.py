"""The entry point of `hv-batch` and of jobs/. It handles signals before the commands are imported, which takes long."""

from hv_batch.cli.process import run_command


def main() -> None:
    """Run the command of `sys.argv`."""

    def run() -> None:
        from hv_batch.cli.main import main as run_main

        run_main()

    run_command(run)


if __name__ == "__main__":
    main()
