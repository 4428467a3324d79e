"""Measures the report page in headless Chromium: bytes and time until it shows a large run, and frames of a scroll.

    python -m hv_batch.bench.report_page --samples 10000

The run is synthetic: documents in the format of a report, small posters, and clips of one short video with
padding. Needs the package playwright (extra `test`) and a Chromium on the PATH; nothing is downloaded.
"""
