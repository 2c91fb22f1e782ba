"""``rmaker-ota c-abi``: what a C compiler needs to know to build a program with libesp_rmaker_ota.

cc gateway.c $(rmaker-ota c-abi --cflags --libs) -o gateway
PKG_CONFIG_PATH=$(rmaker-ota c-abi --pkg-config-dir) pkg-config --cflags --libs esp_rmaker_ota
"""

from __future__ import annotations

import shlex

import click

from rmaker_ota import embed
from rmaker_ota.cli import output


@click.command()
@click.option("--cflags", is_flag=True, help="Options for compiling.")
@click.option("--libs", is_flag=True, help="Options for linking; the program finds the library by itself.")
@click.option("--pkg-config-dir", is_flag=True, help="Directory of esp_rmaker_ota.pc, for PKG_CONFIG_PATH.")
@output.json_option
def command(cflags: bool, libs: bool, pkg_config_dir: bool, as_json: bool) -> None:
    """Say how to build a C or C++ program with libesp_rmaker_ota.

    \b
    cc gateway.c $(rmaker-ota c-abi --cflags --libs) -o gateway
    """
    if not embed.LIBRARY.exists():
        raise click.ClickException(
            "the C ABI is not part of this installation: it needs a Python with a shared libpython; "
            "RMAKER_OTA_C_ABI=1 pip install . says what is missing"
        )
    folder = str(embed.LIBRARY_DIR)
    found = {
        "cflags": ["-I" + str(embed.INCLUDE_DIR)],
        "libs": ["-L" + folder, "-Wl,-rpath," + folder, "-lesp_rmaker_ota"],
        "pkg_config_dir": [str(embed.PKG_CONFIG_DIR)],
    }
    wanted = {"cflags": cflags, "libs": libs, "pkg_config_dir": pkg_config_dir}
    if as_json:
        output.print_json({name: shlex.join(words) for name, words in found.items()} | {"library": str(embed.LIBRARY)})
    elif any(wanted.values()):
        click.echo(shlex.join([word for name, words in found.items() if wanted[name] for word in words]))
    else:
        for name, words in found.items():
            click.echo(f"{name.replace('_', '-')}: {shlex.join(words)}")
