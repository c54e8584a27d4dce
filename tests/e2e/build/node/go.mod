module github.com/orlop-csi/orlop/tests/e2e/build/node

go 1.26.0
