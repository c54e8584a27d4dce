// Package driver is the CSI process: the socket and the gRPC server, what every
// call passes on its way in and out (limits, log, metrics, panics, status
// codes), the Identity service, and the wiring of the services to the pools.
//
// It is the only package that logs, and the only one that knows gRPC codes. It
// never touches a volume itself.
package driver

// Name is the driver's name, by which orchestrators know it.
const Name = "csi.orlop.dev"
