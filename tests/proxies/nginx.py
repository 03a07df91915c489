"""nginx in the foreground, with every file it writes in a directory of its own."""

from __future__ import annotations

import os
from pathlib import Path

# Its worker must be able to write where the test has made room for large bodies.
USER = "user root;" if os.geteuid() == 0 else ""

CONFIG = """
daemon off; {user} pid {directory}/pid; error_log {directory}/error.log; worker_processes 1;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi; uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    {sites}
}}
"""


def config(directory: Path, sites: str) -> str:
    return CONFIG.format(user=USER, directory=directory, sites=sites)


def command(file: Path, *options: str) -> list[str]:
    return ["/usr/sbin/nginx", *options, "-p", str(file.parent), "-c", str(file)]
