"""A configuration is read strictly, and closed unless it is opened."""

from __future__ import annotations

import pytest

from mome_sdk.errors import InputError

OPEN = '[[peers]]\naet = "SCANNER"'


def test_the_usual_configuration(configure):
    config = configure()
    assert config.node.host == "127.0.0.1"
    assert [peer.aet for peer in config.peers if peer.receives] == ["ORTHANC"]
    assert config.results.formats == ("seg", "sr", "sc")


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ('aet = "MOME"', 'aet = "MOME"\nhost = "0.0.0.0"', None),  # a peer may send
        ("sends = true", "sends = false", None),  # loopback
        ("[http]", '[http]\nhost = "0.0.0.0"', "without token_file and tls"),
        ('aet = "MOME"', 'aet = "A TITLE THAT IS TOO LONG"', "no AE title"),
        ('aet = "MOME"', 'aet = "A\\\\B"', "no AE title"),
        ("receives = true", "receives = true\ntls = true", r"\[node.tls\] is missing"),
        ("[http]", '[results]\nformats = ["pdf"]\n[http]', "'pdf'"),
        ("free_mb = 1", "free_gb = 1", "unknown key 'free_gb'"),
        ("quiet_s = 1.5", 'quiet_s = "soon"', "quiet_s"),
    ],
)
def test_what_is_wrong_or_open_is_refused(configure, old, new, found):
    if found is None:
        configure((old, new))
        return
    with pytest.raises(InputError, match=found) as caught:
        configure((old, new))
    assert caught.value.code == "argument.config"


def test_an_open_node_needs_peers_that_send(configure):
    with pytest.raises(InputError, match="no peer may send"):
        configure(
            ('aet = "MOME"', 'aet = "MOME"\nhost = "0.0.0.0"'), ("sends = true", "sends = false")
        )
