"""A real web server on this machine for tests: nginx, a process of its own."""

import contextlib
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.s3_server import free_ports

CONFIG = """
daemon off;
{user}
worker_processes 1;
pid {scratch}/nginx.pid;
error_log {scratch}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {scratch}/body;
    proxy_temp_path {scratch}/proxy;
    fastcgi_temp_path {scratch}/fastcgi;
    uwsgi_temp_path {scratch}/uwsgi;
    scgi_temp_path {scratch}/scgi;
    server {{ listen 127.0.0.1:{port}; root {folder}; }}
}}
"""


def nginx() -> str:
    """Return the program; skip where there is none."""
    found = shutil.which("nginx", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")
    return found or pytest.skip("no nginx: apt-get install nginx-light")


@contextlib.contextmanager
def nginx_server(folder: Path, scratch: Path) -> Iterator[str]:
    """Serve a folder for as long as the block runs; give its address."""
    program, (port,) = nginx(), free_ports(1)
    user = "user root;" if os.geteuid() == 0 else ""
    (scratch / "nginx.conf").write_text(CONFIG.format(scratch=scratch, folder=folder, port=port, user=user))
    process = subprocess.Popen([program, "-c", scratch / "nginx.conf", "-e", scratch / "error.log"])
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(url, timeout=1)
            except urllib.error.HTTPError:  # it lists no folder, but it is there
                break
            except OSError:
                time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait()
