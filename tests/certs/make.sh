#!/bin/sh
# Makes ca.pem, server.pem, server.key, client.pem and client.key, valid for a hundred years.
set -eu
days=36500
curve="-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
openssl req -x509 $curve -days $days -subj "/CN=paddlewheel test authority" \
    -addext "keyUsage=critical,keyCertSign,cRLSign" -keyout ca.key -out ca.pem
for who in server client; do
    openssl req $curve -subj "/CN=$who" -keyout $who.key -out $who.csr
    printf 'subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n' >$who.ext
    openssl x509 -req -in $who.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days $days \
        -extfile $who.ext -out $who.pem
done
rm -f ca.key ca.srl ./*.csr ./*.ext
