"""The daemon on a host: gRPC services, container lifecycle, networks, images."""

import os

# TLS 1.3 only. gRPC for Python cannot set a lowest version, but reads the ciphers of TLS 1.2 from this variable when it
# is imported: one that works only with a pre-shared key, which there is not, leaves TLS 1.2 without any. The ciphers of
# TLS 1.3 are not affected. `agent.auth` refuses other versions as well, should gRPC have been imported before.
os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-PSK-CHACHA20-POLY1305"
