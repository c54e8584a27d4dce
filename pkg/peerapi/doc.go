// Package peerapi is what a router and a node say to each other beyond CSI. It
// is generated from the .proto files by scripts/generate.
package peerapi
