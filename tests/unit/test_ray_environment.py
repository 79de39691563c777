"""Which addresses a launch joins, before anything is made."""

import socket

import pytest

from search.errors import ClusterError
from search.ray_environment import check_reachable


@pytest.mark.parametrize("address", ["ray://10.0.0.5:10001", "https://10.0.0.5"])
def test_a_url_is_refused_with_what_to_give_instead(address: str) -> None:
    with pytest.raises(ClusterError, match=rf"^{address} is no address .* such as 10\.0\.0\.5:6379 .* or auto "):
        check_reachable(address)


def test_an_address_where_somebody_listens_is_tried_and_so_are_rays_own_words() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        for address in (None, "auto", "local", f"127.0.0.1:{server.getsockname()[1]}"):
            check_reachable(address)


@pytest.mark.parametrize("address", ["10.0.0.5", "host:port", "127.0.0.1:1"])
def test_what_is_no_address_or_leads_nowhere_is_named(address: str) -> None:
    with pytest.raises(ClusterError, match=rf"^no Ray cluster answers at {address}: .*check --ray-address"):
        check_reachable(address)
