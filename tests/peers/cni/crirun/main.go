// Command crirun drives a container runtime through the Kubernetes Container Runtime Interface as a kubelet does: a pod
// with one container and host ports, and its removal.
//
//	crirun ENDPOINT run NAME IMAGE HOSTPORT:PORT[/udp],... [COMMAND...]   prints {"sandbox", "container", "ip"}
//	crirun ENDPOINT remove SANDBOX
//	crirun ENDPOINT status                                        prints the runtime's conditions
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "crirun:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 2 {
		return fmt.Errorf("usage: crirun ENDPOINT run|remove|status ...")
	}
	connection, err := grpc.NewClient(args[0], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return fmt.Errorf("the endpoint %s: %w", args[0], err)
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	runtime := cri.NewRuntimeServiceClient(connection)
	switch verb, rest := args[1], args[2:]; {
	case verb == "run" && len(rest) >= 3:
		return runPod(ctx, runtime, rest[0], rest[1], rest[2], rest[3:])
	case verb == "remove" && len(rest) == 1:
		return removePod(ctx, runtime, rest[0])
	case verb == "status" && len(rest) == 0:
		status, err := runtime.Status(ctx, &cri.StatusRequest{})
		if err != nil {
			return err
		}
		return json.NewEncoder(os.Stdout).Encode(status.Status.Conditions)
	default:
		return fmt.Errorf("unknown verb or wrong arguments: %q", args[1:])
	}
}

func runPod(ctx context.Context, runtime cri.RuntimeServiceClient, name, image, ports string, command []string) error {
	mappings, err := portMappings(ports)
	if err != nil {
		return err
	}
	pod := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Namespace: "default", Uid: "uid-" + name},
		Hostname:     name,
		PortMappings: mappings,
		Linux:        &cri.LinuxPodSandboxConfig{},
	}
	sandbox, err := runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: pod})
	if err != nil {
		return fmt.Errorf("RunPodSandbox: %w", err)
	}
	container, err := runtime.CreateContainer(ctx, &cri.CreateContainerRequest{
		PodSandboxId:  sandbox.PodSandboxId,
		SandboxConfig: pod,
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "main"},
			Image:    &cri.ImageSpec{Image: image},
			Command:  command,
			Linux:    &cri.LinuxContainerConfig{},
		},
	})
	if err != nil {
		return fmt.Errorf("CreateContainer: %w", err)
	}
	if _, err := runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: container.ContainerId}); err != nil {
		return fmt.Errorf("StartContainer: %w", err)
	}
	status, err := runtime.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: sandbox.PodSandboxId})
	if err != nil {
		return fmt.Errorf("PodSandboxStatus: %w", err)
	}
	return json.NewEncoder(os.Stdout).Encode(map[string]string{
		"sandbox":   sandbox.PodSandboxId,
		"container": container.ContainerId,
		"ip":        status.Status.GetNetwork().GetIp(),
	})
}

func portMappings(text string) ([]*cri.PortMapping, error) {
	var mappings []*cri.PortMapping
	for _, part := range strings.FieldsFunc(text, func(r rune) bool { return r == ',' }) {
		pair, protocol, _ := strings.Cut(part, "/")
		host, inside, found := strings.Cut(pair, ":")
		hostPort, hostError := strconv.ParseUint(host, 10, 16)
		port, insideError := strconv.ParseUint(inside, 10, 16)
		if !found || hostError != nil || insideError != nil {
			return nil, fmt.Errorf("%q is not HOSTPORT:PORT", part)
		}
		mapping := &cri.PortMapping{HostPort: int32(hostPort), ContainerPort: int32(port)}
		switch protocol {
		case "", "tcp":
		case "udp":
			mapping.Protocol = cri.Protocol_UDP
		default:
			return nil, fmt.Errorf("%q is neither tcp nor udp", protocol)
		}
		mappings = append(mappings, mapping)
	}
	return mappings, nil
}

func removePod(ctx context.Context, runtime cri.RuntimeServiceClient, sandbox string) error {
	if _, err := runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: sandbox}); err != nil {
		return fmt.Errorf("StopPodSandbox: %w", err)
	}
	if _, err := runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: sandbox}); err != nil {
		return fmt.Errorf("RemovePodSandbox: %w", err)
	}
	return nil
}
