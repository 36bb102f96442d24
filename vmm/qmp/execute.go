package qmp

// Names lists the commands, in order.
func (s *Server) Names() (names []string) {
	for _, c := range s.cfg.Commands {
		names = append(names, c.Name)
	}
	return names
}

// Execute runs a command for somebody who is no client, such as the human monitor. It has to
// be called where commands run. Numbers among the arguments are json.Number.
func (s *Server) Execute(name string, args map[string]any) (any, error) {
	c, ok := s.commands[name]
	if !ok {
		return nil, noCommand(name)
	}
	return c.execute(args, nil)
}
