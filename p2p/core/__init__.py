"""The decisions of a peer. Pure: no clock, no socket, no event loop; daemon and simulator run exactly this."""
